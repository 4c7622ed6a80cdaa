"""No test here looks at pictures but those that are marked ``drawn``."""

from support.pictures import unrendered

__all__ = ["unrendered"]
