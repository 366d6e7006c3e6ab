"""`python -m audiomaepp …` is the command `audiomaepp …`; with `torchrun -m audiomaepp train …` on several processes."""

from audiomaepp.cli import main

if __name__ == "__main__":  # and not in the processes that a loader starts
    main()
