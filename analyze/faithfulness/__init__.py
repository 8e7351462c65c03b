"""Whether dictionaries can stand in for the MLPs they explain: the model is run with them spliced in, and compared with itself."""
