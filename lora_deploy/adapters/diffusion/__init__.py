"""What the formats of diffusion adapters share: names of modules and tensors, and the updates that these make.

keys        a key ─▶ component, module and slot, and which format has such keys
algorithms  the tensors of one module ─▶ its updates: LoRA, LoCon, LoHa, LoKr, OFT, BOFT, GLoRA, IA3, differences
reading     a file ─▶ an adapter
"""
