# PyTorch is not there where types are checked: whatever it has is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
