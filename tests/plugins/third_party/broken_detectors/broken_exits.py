import sys

sys.exit("a script without a guard")
