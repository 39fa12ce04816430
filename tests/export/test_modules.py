from __future__ import annotations

from torch import nn

from evalmode.export.modules import named_everything


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(1, 1)
        self.listed = [nn.Dropout(0.1), (nn.Dropout(0.2),)]
        self.keyed = {"head": nn.Dropout(0.3)}
        self.itself = self.seen


def test_modules_in_plain_containers_are_found_and_named_as_one_writes_them() -> None:
    assert set(named_everything(Hiding())) == {"", "seen", "listed[0]", "listed[1][0]", "keyed['head']"}


def test_a_module_that_two_names_share_is_found_once() -> None:
    assert "itself" not in named_everything(Hiding())


def test_the_hidden_are_found_at_depth() -> None:
    assert "0.listed[0]" in named_everything(nn.Sequential(Hiding()))


def test_a_container_that_holds_itself_ends() -> None:
    module = Hiding()
    module.listed.append(module.listed)  # type: ignore[arg-type]
    assert "listed[0]" in named_everything(module)
