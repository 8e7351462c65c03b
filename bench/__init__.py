"""Speed, as ratios against named alternatives measured in the same run.  `make bench` prints the table; no test asserts a speed."""
