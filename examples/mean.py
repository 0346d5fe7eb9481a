"""A source file with a hole: `make demo` fills it where the mark stands."""


def mean(values):
    return sum(values) / len(<FILL_ME>
