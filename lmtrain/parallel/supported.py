def check(model, *, seq_len, cluster, mesh):
    return None
