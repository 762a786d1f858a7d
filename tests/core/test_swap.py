from dataclasses import dataclass, field

from fedelta.core.swap import swapped


@dataclass(frozen=True)
class Leaf:
    number: int


@dataclass(frozen=True)
class Tree:
    left: object
    right: object = None
    size: int = field(default=0, init=False)


def test_an_object_is_swapped_wherever_it_lies() -> None:
    old, alike, new = Leaf(1), Leaf(1), Leaf(2)
    tree = Tree(Tree(old, alike), old)
    found = swapped(tree, old, new)
    assert found == Tree(Tree(Leaf(2), Leaf(1)), Leaf(2))
    assert found.left.left is new
    assert found.left.right is alike  # equal, and not the same
    assert tree == Tree(Tree(Leaf(1), Leaf(1)), Leaf(1))


def test_what_does_not_hold_it_is_the_same_object() -> None:
    for part in (Tree(Tree(1), "a"), [Leaf(1)], Leaf, None):
        assert swapped(part, Leaf(1), Leaf(2)) is part
    assert swapped("a", "a", "b") == "b"
