"""Names on the command line → classes. A loss or network of one's own gets a line here."""

from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO

TRAINERS = {"ERM": ERM, "groupDRO": GroupDRO, "IRM": IRM, "Backdoor": Backdoor}
NETWORKS = {"MLP": MLP, "CNN": CNN}
