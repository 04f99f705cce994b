"""Checkpoints: a directory that becomes visible by one rename, and "latest" is the newest that verifies.

Import from the modules themselves: ``commit``, ``storage``, ``lock`` and ``retention`` work without torch.
"""
