NotAModel = "a string"
