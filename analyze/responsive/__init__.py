"""Where a feature's steering shows: prompts on which it is active but not saturated, drawn with it changed, ranked by the response."""
