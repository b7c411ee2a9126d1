"""``neo inspect``: what a recipe's run would need, told without its weights."""

from neo_components.inspection.report import Assumed, Report, inspect_recipe
from neo_components.inspection.show import as_json, as_text

__all__ = ["Assumed", "Report", "as_json", "as_text", "inspect_recipe"]
