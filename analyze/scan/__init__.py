"""Which features to look at: those that tell prompts apart, light up in a region, change over the steps, or are strongest."""
