def mean(values):
    return sum(values) / len(<FILL_ME>
