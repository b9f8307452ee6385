"""Pages: one file each in this folder, found by themselves."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType

from app.context import Context


@dataclass(frozen=True)
class Page:
    """A page: its module says TITLE, PATH, ORDER, KEY ("" if it has none) and build(ctx)."""

    name: str
    module: ModuleType

    @property
    def title(self) -> str:
        return str(self.module.TITLE)

    @property
    def path(self) -> str:
        return str(self.module.PATH)

    @property
    def in_bar(self) -> bool:
        """ORDER 0 keeps a page out of the top bar: it is reached from others."""
        return bool(self.module.ORDER)

    @property
    def key(self) -> str:
        return str(self.module.KEY)

    def build(self, ctx: Context) -> None:
        self.module.build(ctx)


def find() -> list[Page]:
    """Every page, in the order of the top bar."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    pages = [Page(name, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return sorted(pages, key=lambda page: (page.module.ORDER or 99, page.name))
