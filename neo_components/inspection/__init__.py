"""``neo inspect``: the cost of a recipe's run, estimated without weights."""

from neo_components.inspection.report import Assumed, Report, inspect_recipe
from neo_components.inspection.show import as_json, as_text

__all__ = ["Assumed", "Report", "as_json", "as_text", "inspect_recipe"]
