raise AssertionError("a package whose every name is taken is not imported")
