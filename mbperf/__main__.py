"""`python -m mbperf` is the command `mbperf`."""

from mbperf.cli import main

if __name__ == "__main__":
    main(prog_name="python -m mbperf")
