"""What a layout needs and how fast it is, said without a GPU and without torch.

One model of cost: the bytes that the runtime allocates, layouts that it refuses, and terms that add up to a step.
"""
