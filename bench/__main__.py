"""`make bench`: every comparison of ours in one run on this machine, as a table of ratios."""

import os
import platform

import torch

from bench import harvest_overhead, loader, pack_copy, store_io, train_step


def main() -> None:
    """Run the comparisons one after the other and print each as it ends."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; best of 3, by turns; ratio = ours / alternative"
    )
    print(f"{'what':<34} {'ours':>10}   {'alternative':<44} {'it':>10}   {'ratio':>6}   least work")
    for group in (store_io, pack_copy, loader, train_step, harvest_overhead):
        for comparison in group.comparisons():
            print(comparison.line(), flush=True)


if __name__ == "__main__":
    main()
