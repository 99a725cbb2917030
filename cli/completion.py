"""Completion of what users type most: recipes, fields, executors, runs, checkpoints."""

from collections.abc import Callable

Offers = Callable[[str], list[tuple[str, str]]]


def of(what: str) -> Offers:
    """Offer what the function of this name in `recipes.completing` finds; imported when a shell asks."""

    def offer(incomplete: str) -> list[tuple[str, str]]:
        from hybrid.errors import UserError
        from recipes import completing

        try:
            return getattr(completing, what)(incomplete)
        except UserError:  # a file of the user's that is wrong is said when it is used
            return []

    return offer
