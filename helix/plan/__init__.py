"""What a layout needs and how fast it is, said without a GPU and without torch (docs/layouts.md).

One model of cost for the runtime, which refuses layouts, sizes its cache and logs what it predicted by it, and for the
commands that plan, sweep and draw.
"""
