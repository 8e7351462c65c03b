"""How a pack is made: what its rows are, how the memory is divided, the two passes, and who does them."""
