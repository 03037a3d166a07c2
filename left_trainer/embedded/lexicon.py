"""Words of the embedded grammar. Data only: `grammar.py` says how they combine.

Names of people and places are built from syllables, so that thousands of them exist and a model has to copy them
instead of remembering them.
"""

from __future__ import annotations

from typing import TypedDict


class Topic(TypedDict):
    """The words of one topic of the news."""

    roles: list[str]
    verbs: list[tuple[str, str, str]]
    nouns: list[str]
    adjectives: list[str]
    reasons: list[str]


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


FIRST_NAMES = _words(
    "Ada Alan Alice Amara Anders Anna Arthur Astrid Ben Bianca Boris Carla Cecil Chloe Clara Colin Dana Daniel Daria "
    "David Diego Doris Edgar Elena Elias Ella Emil Emma Eric Esther Eva Felix Fiona Frank Freya Gina Grace Greta Gus "
    "Hana Harold Hassan Hector Helen Henry Hugo Ida Igor Ines Irene Isaac Ivan Jack Jane Jasper Joan Jonas Julia Karl "
    "Kate Kenji Kira Lara Laura Lena Leon Lily Linus Louis Lucia Magnus Mara Marco Maria Martin Maya Mei Mia Milo Mona "
    "Nadia Nina Nora Olga Oliver Omar Oscar Otto Paula Pavel Petra Priya Quinn Ralph Ravi Rita Robin Rosa Ruth Samuel "
    "Sara Selma Simon Sofia Sven Tara Thea Tina Tobias Uma Ursula Vera Victor Wanda Willa Xenia Yara Yusuf Zoe"
)
SURNAME_STARTS = _words(
    "Ab Al And Bal Bar Bel Ber Bor Bran Cal Car Cor Dal Dor El Fal Far Fen Gal Gar Hal Hart Hol Jar Kal Kel Lan Lor "
    "Mal Mar Mor Nor Or Pal Per Ros San Sel Tal Tor Val Var Wal Win Yor Zan"
)
SURNAME_ENDS = _words(
    "ado and ano aris berg bright comb dale dano den ero etti field ford gren holm ides ini kin kov land ley lin low "
    "man mark mont ner ova rick ro rson sen sky son stad ten ters tin ton vic ville wood worth zar"
)
PLACE_STARTS = _words(
    "Amber Ash Beck Birch Black Bridge Brook Castle Clay Clear Cold Copper Dun Eagle East Fair Fern Glen Gold Grand "
    "Green Grey Hamp Haver Hazel High Iron Kel King Lake Lime Long Maple Mill Moor New North Oak Old Pine Port Queen "
    "Raven Red River Rock Salt Silver South Spring Stone Sun Thorn West White Wild Wind Wolf"
)
PLACE_ENDS = _words(
    "berry borough bury by castle church cliff cross dale field ford gate grove ham haven hill holm hurst land ley "
    "mere minster mont moor mouth ness point pool port ridge shore side stead stoke thorpe ton vale view ville ward "
    "water well wick wood worth"
)
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NUMBERS = _words(
    "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty sixty seventy eighty"
)

# topic -> roles, verbs (summary form first, then the forms a document may use), nouns, adjectives, reasons
TOPICS: dict[str, Topic] = {
    "politics": {
        "roles": _phrases(
            "mayor, governor, senator, minister, councillor, deputy mayor, party leader, finance minister, ambassador"
        ),
        "verbs": [
            ("approved", "signed off on", "gave approval to"),
            ("rejected", "voted down", "turned down"),
            ("proposed", "put forward", "tabled"),
            ("delayed", "postponed", "put off"),
            ("cancelled", "scrapped", "withdrew"),
        ],
        "nouns": _phrases(
            "budget, housing plan, tax reform, school law, parking rule, trade deal, pension bill, water treaty, "
            "voting reform, land survey, noise rule, farm subsidy, border agreement, climate pledge, transport plan"
        ),
        "adjectives": _words("new regional national controversial revised emergency joint detailed local temporary"),
        "reasons": _phrases(
            "a long debate, weeks of protest, a close vote, a public hearing, pressure from residents, a court ruling, "
            "a legal review, talks with the unions, a petition, an election promise"
        ),
    },
    "business": {
        "roles": _phrases(
            "director, chairman, founder, banker, investor, sales manager, factory owner, chief executive, broker"
        ),
        "verbs": [
            ("bought", "acquired", "took over"),
            ("sold", "disposed of", "found a buyer for"),
            ("closed", "shut down", "shut"),
            ("expanded", "enlarged", "extended"),
            ("launched", "introduced", "started"),
        ],
        "nouns": _phrases(
            "bakery, shipyard, paper mill, hotel chain, furniture factory, software firm, dairy, brewery, textile "
            "plant, online shop, battery maker, toy company, glass works, repair service, delivery company, steel plant"
        ),
        "adjectives": _words("large small profitable struggling famous modern rival foreign historic busy"),
        "reasons": _phrases(
            "a fall in sales, record profits, rising costs, a strike, strong demand, a merger, months of losses, "
            "a change of owner, a new contract, a safety audit"
        ),
    },
    "sport": {
        "roles": _phrases(
            "coach, striker, goalkeeper, captain, swimmer, cyclist, referee, club president, sprinter, tennis player"
        ),
        "verbs": [
            ("won", "claimed", "took"),
            ("lost", "missed out on", "was beaten in"),
            ("left", "pulled out of", "quit"),
            ("joined", "signed up for", "entered"),
            ("praised", "spoke warmly of", "applauded"),
        ],
        "nouns": _phrases(
            "cup final, marathon, league match, relay race, chess tournament, rowing regatta, ski race, boxing match, "
            "cycling tour, hockey game, golf open, youth championship, swimming gala, rugby derby, charity match"
        ),
        "adjectives": _words("annual opening decisive international local thrilling long indoor regional second"),
        "reasons": _phrases(
            "a late goal, an injury, a penalty shoot-out, a bad start, months of training, a dispute over pay, "
            "a record crowd, a red card, heavy rain, a fall"
        ),
    },
    "science": {
        "roles": _phrases(
            "professor, biologist, chemist, astronomer, engineer, geologist, doctor, physicist, student, surgeon"
        ),
        "verbs": [
            ("discovered", "came across", "found"),
            ("tested", "carried out trials of", "tried out"),
            ("built", "constructed", "put together"),
            ("studied", "examined", "looked into"),
            ("presented", "showed", "unveiled"),
        ],
        "nouns": _phrases(
            "vaccine, comet, beetle, solar panel, fossil, water filter, robot, telescope, heart valve, battery, "
            "enzyme, sensor, cave painting, weather balloon, microscope, seed bank, radio signal"
        ),
        "adjectives": _words("rare cheap tiny powerful ancient unknown promising simple giant fragile"),
        "reasons": _phrases(
            "years of research, a lucky accident, a failed experiment, a grant, a series of trials, a tip from a "
            "farmer, a field trip, a power cut, advice from a colleague, a long expedition"
        ),
    },
    "culture": {
        "roles": _phrases(
            "novelist, painter, conductor, curator, actress, film director, singer, poet, librarian, sculptor"
        ),
        "verbs": [
            ("opened", "inaugurated", "cut the ribbon at"),
            ("donated", "gave away", "handed over"),
            ("restored", "brought back to life", "repaired"),
            ("designed", "drew up", "drew the plans for"),
            ("visited", "toured", "paid a visit to"),
        ],
        "nouns": _phrases(
            "library, museum, theatre, gallery, opera house, concert hall, sculpture, bookshop, cinema, organ, mural, "
            "puppet show, piano, archive, monument, dance school, garden"
        ),
        "adjectives": _words("restored beautiful forgotten wooden grand royal open-air colourful medieval popular"),
        "reasons": _phrases(
            "a fire, a generous gift, ten years of work, a flood, a bequest, a fundraising concert, a public appeal, "
            "a quarrel, a successful tour, a wedding"
        ),
    },
    "transport": {
        "roles": _phrases(
            "station master, pilot, harbour master, bus driver, train driver, road planner, ship captain, inspector"
        ),
        "verbs": [
            ("reopened", "opened again", "brought back into service"),
            ("blocked", "cut off", "closed off"),
            ("inspected", "checked", "made an inspection of"),
            ("damaged", "caused damage to", "drove into"),
            ("replaced", "swapped out", "put in a substitute for"),
        ],
        "nouns": _phrases(
            "bridge, tunnel, tram line, railway station, ferry terminal, airport, bus lane, canal lock, cable car, "
            "lighthouse, motorway exit, level crossing, bicycle path, harbour wall, roundabout, signal box"
        ),
        "adjectives": _words("narrow busy old northern southern main flooded electric abandoned underground"),
        "reasons": _phrases(
            "a storm, a landslide, a derailment, repairs, thick fog, a collision, a broken cable, snowfall, "
            "a bomb scare, a software fault"
        ),
    },
}

PEOPLE = _phrases(
    "local residents, neighbours, shop owners, parents, critics, supporters, visitors, experts, officials, tourists, "
    "students, reporters, volunteers, farmers, commuters, pensioners, union leaders, historians"
)
OPINIONS = _phrases(
    "it was long overdue, nobody had expected it, the decision came too late, it would change daily life, the work had "
    "only begun, it was good news for the region, there were still open questions, it deserved more attention, the "
    "cost was too high, it set a good example, more should follow, the mood was hopeful"
)
FILLERS = _phrases(
    "The weather was mild and dry, A crowd of about {n} people gathered outside, Tickets had sold out {n} days before, "
    "Police closed {n} streets for the occasion, The ceremony lasted {n} minutes, A second meeting is planned in "
    "{month}, Officials refused to say how much it cost, Local television showed it live, Some {n} guests had been "
    "invited, The final report is due in {month}, Preparations had taken {n} weeks, A small protest ended peacefully, "
    "The bill came to {n} million crowns, More details are expected in {month}"
)
QUALITIES = {
    "positive": _words("wonderful charming excellent delightful superb clever lovely brilliant pleasant refreshing"),
    "negative": _words("boring dreadful awful clumsy disappointing dull noisy terrible rude tiresome"),
}

DISHES = _phrases(
    "tomato soup, mushroom pie, grilled trout, roast chicken, cheese omelette, lentil curry, apple cake, onion tart, "
    "beef stew, pancakes, green salad, fish cakes, rice pudding, pumpkin risotto, noodle soup, lamb chops, plum tart, "
    "garlic bread, potato salad, lemon sorbet, bean burger, spinach lasagne, carrot cake, seafood pasta"
)
DRINKS = _phrases(
    "black coffee, mint tea, orange juice, apple cider, hot chocolate, lemonade, ginger beer, iced tea, sparkling "
    "water, red wine, milk, green tea, tonic water, tomato juice"
)
VEHICLES = _words("train bus ferry coach tram boat")
ROOMS = _words("single double twin family quiet")

# English noun, French noun, French gender
NOUNS_FR = [
    tuple(entry.split("/"))
    for entry in _words(
        "cat/chat/m dog/chien/m house/maison/f book/livre/m table/table/f letter/lettre/f car/voiture/f tree/arbre/m "
        "garden/jardin/m door/porte/f window/fenêtre/f king/roi/m queen/reine/f doctor/médecin/m teacher/professeur/m "
        "girl/fille/f boy/garçon/m baker/boulanger/m farmer/fermier/m singer/chanteuse/f bird/oiseau/m horse/cheval/m "
        "flower/fleur/f bread/pain/m apple/pomme/f cup/tasse/f bridge/pont/m boat/bateau/m street/rue/f town/ville/f "
        "mountain/montagne/f river/rivière/f soup/soupe/f hat/chapeau/m shirt/chemise/f shoe/chaussure/f key/clé/f "
        "map/carte/f picture/tableau/m song/chanson/f chair/chaise/f box/boîte/f knife/couteau/m spoon/cuillère/f "
        "bag/sac/m coat/manteau/m clock/horloge/f wall/mur/m star/étoile/f lamp/lampe/f"
    )
]
# English adjective, masculine, feminine; the French adjective follows its noun
ADJECTIVES_FR = [
    tuple(entry.split("/"))
    for entry in _words(
        "red/rouge/rouge green/vert/verte black/noir/noire white/blanc/blanche blue/bleu/bleue heavy/lourd/lourde "
        "light/léger/légère empty/vide/vide full/plein/pleine clean/propre/propre dirty/sale/sale rich/riche/riche "
        "poor/pauvre/pauvre sad/triste/triste happy/content/contente famous/célèbre/célèbre strong/fort/forte "
        "weak/faible/faible round/rond/ronde open/ouvert/ouverte closed/fermé/fermée cold/froid/froide "
        "warm/chaud/chaude quiet/calme/calme strange/étrange/étrange"
    )
]
# English past, French passé composé
VERBS_FR = [
    tuple(entry.split("/"))
    for entry in _phrases(
        "saw/a vu, found/a trouvé, bought/a acheté, sold/a vendu, lost/a perdu, painted/a peint, washed/a lavé, "
        "hid/a caché, broke/a cassé, repaired/a réparé, carried/a porté, opened/a ouvert, closed/a fermé, "
        "forgot/a oublié, wanted/a voulu, took/a pris, chose/a choisi, showed/a montré, drew/a dessiné, sent/a envoyé"
    )
]
TIMES_FR = [
    tuple(entry.split("/"))
    for entry in _phrases(
        "yesterday/hier, this morning/ce matin, today/aujourd'hui, last night/hier soir, on Monday/lundi, "
        "on Tuesday/mardi, on Friday/vendredi, on Sunday/dimanche, in winter/en hiver, in summer/en été"
    )
]
PLACES_FR = [
    tuple(entry.split("/"))
    for entry in _phrases(
        "in the kitchen/dans la cuisine, near the church/près de l'église, at the market/au marché, behind the "
        "school/derrière l'école, in the forest/dans la forêt, at the station/à la gare, under the bridge/sous le "
        "pont, in front of the museum/devant le musée"
    )
]
