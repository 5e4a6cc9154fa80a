"""What only a decode node does: the stages of a request, its pages, its prefill peers."""
