"""The thesis' grid of losses, seeds and digits: its plan, its cells, their rows, and the pages made from them."""
