"""Names on the command line → classes. Add a line here for your own loss or network."""

from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO

TRAINERS = {"ERM": ERM, "groupDRO": GroupDRO, "IRM": IRM, "Backdoor": Backdoor}
NETWORKS = {"MLP": MLP, "CNN": CNN}
