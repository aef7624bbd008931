"""`python -m companion.bench`: every benchmark, one after the other."""

import sys

from companion.bench import decoding, stopwatch

if __name__ == "__main__":
    sys.exit(max(stopwatch.main([]), decoding.main()))
