raise RuntimeError("this package\nis broken")
