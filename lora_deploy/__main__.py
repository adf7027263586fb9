"""``python -m lora_deploy`` is the command ``lora-deploy``."""

from lora_deploy.cli import run

if __name__ == "__main__":
    run()
