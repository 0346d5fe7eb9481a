"""A source file with a hole: `make demo` fills it where the mark stands."""


def count_words(path):
    counts = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            for word in line.split(<FILL_ME>:
                counts[word] = counts.get(word, 0) + 1
    return counts
