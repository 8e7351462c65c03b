"""`tiny-flux`: a real `FluxPipeline` of a few MB that draws coloured shapes, the program that makes it, and its judge."""
