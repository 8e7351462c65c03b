"""The page of attribution graphs: layers upwards, streams apart, what excites and what suppresses, and the traced picture."""
