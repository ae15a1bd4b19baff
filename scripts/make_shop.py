"""Write configs/tiny/shop.csv and shop_items.csv: what 400 made-up customers of a hobby shop bought, from one seed.

    uv run python scripts/make_shop.py

Each works on two projects at a time and buys the parts of each in order, now and then something else. So what comes
next often depends on more than the last purchase: counting what follows an item sees one of the projects only.
"""

from pathlib import Path
from random import Random

FOLDER = Path(__file__).parents[1] / "configs" / "tiny"
SEED = 0
CUSTOMERS, PURCHASES, OTHER_SHARE = 400, (5, 10), 0.1
PROJECTS = (
    "bird table,garden shed,rabbit hutch,toy train,model boat,dolls house,kitchen shelf,picture frame,wooden chair,"
    "night lamp"
).split(",")
PARTS = "plan,oak boards,hand saw,box of screws,glue,sandpaper,paint,brush,brass handle,wax".split(",")


def main() -> None:
    random = Random(SEED)
    items = [f"{project} {part}" for project in PROJECTS for part in PARTS]
    rows = list[tuple[str, str, int]]()
    for customer in range(CUSTOMERS):
        projects = random.sample(range(len(PROJECTS)), 2)
        places, time = [random.randrange(4) for _ in projects], random.randrange(1000)
        for _ in range(random.randint(*PURCHASES)):
            which = random.randrange(2)
            if random.random() < OTHER_SHARE or places[which] >= len(PARTS):
                item = random.randrange(len(items))
            else:
                item = projects[which] * len(PARTS) + places[which]
                places[which] += 1
            rows.append((f"c{customer}", f"i{item}", time))
            time += random.randint(1, 9)
    lines = (f"{user},{item},{time}\n" for user, item, time in sorted(rows, key=lambda row: row[2]))
    (FOLDER / "shop.csv").write_text("user,item,time\n" + "".join(lines))
    (FOLDER / "shop_items.csv").write_text("item,title\n" + "".join(f"i{n},{title}\n" for n, title in enumerate(items)))


if __name__ == "__main__":
    main()
