"""Recipes: a whole deployment in one YAML file, from adapters to targets. No tensor library is imported.

    read    text ─▶ Recipe, or every fault with its line
    cells   Recipe ─▶ one cell for each adapter and dtype
    schema  Recipe's JSON Schema, for editors
    library recipes that come with the package

Promise: an unknown key is an error that names the nearest one; a secret has no place here; paths are relative to the
recipe's own folder.
"""
