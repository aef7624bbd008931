"""`python -m companion.bench`: every benchmark, one after the other."""

import sys

from companion.bench import decoding, quantized, stopwatch, training

if __name__ == "__main__":
    codes = [stopwatch.main([]), decoding.main(), training.main([])]
    codes += [quantized.main(["--threads", threads]) for threads in ("1", "2")]
    sys.exit(max(codes))
