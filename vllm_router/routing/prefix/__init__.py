"""The prefix index: an estimate of the blocks that each server has cached."""
