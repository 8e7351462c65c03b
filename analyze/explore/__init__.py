"""`analyze explore`: find a feature, move a slider, see the picture change; a local app."""
