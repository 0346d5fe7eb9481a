class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.<FILL_ME>(item)

    def pop(self):
        return self.items.pop()
