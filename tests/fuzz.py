"""Thousands of random networks through everything that is promised; `make fuzz` runs it.

    python tests/fuzz.py --networks 5000

Prints how many networks had each feature, and ends with exit code 1 where a network fails, which
is then printed, as small as hypothesis finds it; or where a feature came up less than 100 times
in 5,000 networks.
"""

import sys

from fuzzing import examples_of, main
from hypothesis import strategies as st
from networks import features, networks
from promises import OPTIONS, check, check_round_trip


def promised(example):
    drawn, options = example
    found = features(drawn) | {f"options {options}"}
    identity = (str(drawn.model), drawn.training, str(options))
    check(drawn, options)
    if options == OPTIONS[0] and check_round_trip(drawn):  # of a third: it takes as long again
        found.add("folded and restored")
    return found, identity


def fuzz(job):
    return examples_of(job, st.tuples(networks(), st.sampled_from(OPTIONS)), promised)


if __name__ == "__main__":
    sys.exit(main(fuzz, __doc__.splitlines()[0], "networks", 5000, rare=0.02))
