"""Views of a report."""


def text(report):
    return repr(report)
