"""Evidence from data: second moments of layers' states and of the loss's gradients, gathered at little cost."""
