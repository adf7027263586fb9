"""PEFT LORA adapters: folders, lone files and raw state dicts."""
