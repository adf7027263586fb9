"""PEFT LORA adapters: folders, lone files and raw state dicts."""

from lora_deploy.adapters.peft.reader import READER, PeftReader

__all__ = ["READER", "PeftReader"]
