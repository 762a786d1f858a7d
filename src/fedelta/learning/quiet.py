"""Loading and saving without the reports and bars of `transformers`; what it says of a network stays."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing a report of new weights and a bar of loaded ones; downloads keep their bars."""
    from transformers.utils import logging as output

    verbosity = output.get_verbosity()
    hook = output.set_tqdm_hook(_without_bar)
    output.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        output.set_verbosity(verbosity)
        output.set_tqdm_hook(hook)


def _without_bar(_: object, args: tuple[Iterable[object], ...], kwargs: Mapping[str, object]) -> Any:
    from transformers.utils.logging import EmptyTqdm

    return EmptyTqdm(*args, **kwargs)  # type: ignore[no-untyped-call]
