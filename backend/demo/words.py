"""Word lists of the bundled corpus: what the generated sentences are made of."""


def words(text: str) -> list[str]:
    """Words between blanks."""
    return text.split()


def pairs(text: str) -> list[tuple[str, str]]:
    """Words in pairs `left-right`, or `left: right` with blanks inside where | parts the pairs."""
    if "|" not in text:
        return [(pair.split("-")[0], pair.split("-")[1]) for pair in text.split()]
    lines = (" ".join(pair.split()) for pair in text.split("|"))
    return [(line.split(": ")[0], line.split(": ")[1]) for line in lines]


CAPITALS = dict(
    pairs(
        """
    France: Paris | Italy: Rome | Spain: Madrid | Portugal: Lisbon | Germany: Berlin | Austria:
    Vienna | Poland: Warsaw | Hungary: Budapest | Greece: Athens | Norway: Oslo | Sweden: Stockholm
    | Finland: Helsinki | Denmark: Copenhagen | Ireland: Dublin | Iceland: Reykjavik | Russia:
    Moscow | Ukraine: Kyiv | Belarus: Minsk | Latvia: Riga | Estonia: Tallinn | Lithuania: Vilnius |
    Romania: Bucharest | Bulgaria: Sofia | Serbia: Belgrade | Croatia: Zagreb | Slovenia: Ljubljana
    | Albania: Tirana | Malta: Valletta | Cyprus: Nicosia | Turkey: Ankara | Georgia: Tbilisi |
    Armenia: Yerevan | Azerbaijan: Baku | Iran: Tehran | Iraq: Baghdad | Syria: Damascus | Lebanon:
    Beirut | Jordan: Amman | Qatar: Doha | Oman: Muscat | Yemen: Sanaa | Egypt: Cairo | Libya:
    Tripoli | Tunisia: Tunis | Morocco: Rabat | Sudan: Khartoum | Kenya: Nairobi | Uganda: Kampala |
    Rwanda: Kigali | Zambia: Lusaka | Zimbabwe: Harare | Angola: Luanda | Namibia: Windhoek | Ghana:
    Accra | Nigeria: Abuja | Senegal: Dakar | Mali: Bamako | Niger: Niamey | Somalia: Mogadishu |
    Mozambique: Maputo | India: Delhi | Nepal: Kathmandu | Pakistan: Islamabad | Bangladesh: Dhaka |
    China: Beijing | Japan: Tokyo | Mongolia: Ulaanbaatar | Thailand: Bangkok | Vietnam: Hanoi |
    Laos: Vientiane | Indonesia: Jakarta | Philippines: Manila | Australia: Canberra | Fiji: Suva |
    Canada: Ottawa | Cuba: Havana | Jamaica: Kingston | Haiti: Port-au-Prince | Bahamas: Nassau |
    Peru: Lima | Chile: Santiago | Brazil: Brasilia | Ecuador: Quito | Colombia: Bogota | Venezuela:
    Caracas | Uruguay: Montevideo | Paraguay: Asuncion | Honduras: Tegucigalpa | Nicaragua: Managua
    | Kazakhstan: Astana | Uzbekistan: Tashkent | Afghanistan: Kabul | Botswana: Gaborone
    """
    )
)
OPPOSITES = pairs(
    """
    hot-cold big-small fast-slow day-night up-down left-right open-closed light-dark young-old
    rich-poor wet-dry hard-soft high-low long-short thick-thin wide-narrow heavy-weightless
    full-empty clean-dirty loud-quiet early-late first-last good-bad happy-sad strong-weak
    brave-afraid sweet-sour smooth-rough sharp-blunt deep-shallow true-false right-wrong near-far
    inside-outside above-below before-after always-never push-pull give-take buy-sell win-lose
    begin-end love-hate laugh-cry come-go rise-fall sink-float build-destroy remember-forget
    arrive-depart sleep-wake question-answer friend-enemy summer-winter north-south east-west
    king-queen sun-moon land-sea heaven-earth peace-war birth-death morning-evening front-back
    top-bottom entrance-exit success-failure victory-defeat profit-loss hero-villain teacher-pupil
    giant-dwarf ancient-modern guilty-innocent polite-rude careful-careless simple-complex
    cheap-expensive safe-dangerous alive-dead awake-asleep tight-loose straight-curved
    public-private major-minor native-foreign natural-artificial odd-even positive-negative
    plus-minus more-less many-few everything-nothing everyone-nobody accept-refuse attack-defend
    borrow-lend freeze-melt expand-shrink import-export increase-decrease praise-blame reward-punish
    lead-follow speak-listen hide-reveal join-separate whisper-shout gather-scatter bright-dull
    calm-stormy generous-greedy humble-proud tall-tiny fresh-stale raw-cooked visible-hidden
    common-rare
    """
)

TOWN_PARTS = ("Kas Dor Vel Mar Tin Ol Ren Bra Hal Sor", "ten by mouth ford wick")
FIRST_PARTS = ("Mi To Ka Ru Se Lo Ni Va", "ra ven lin da rik mo sha bel")
LAST_PARTS = ("Bar Cor Dun Fal Gol Har Kel Mor", "dan eth ick low mer nas oby ust")
JOBS = words(
    """
    baker doctor sailor farmer teacher painter miner tailor cook judge nurse pilot clerk potter
    singer dancer writer hunter fisher weaver smith guard priest dentist plumber lawyer chemist
    gardener carpenter librarian
    """
)
PETS = words(
    """
    heron rabbit otter parrot goat tortoise ferret pony spaniel goose hamster gecko magpie donkey
    salmon kitten beetle lizard peacock badger hedgehog squirrel canary poodle llama python raven
    hornet lobster monkey
    """
)
DISHES = words(
    """
    soup bread rice beans pancakes noodles salad cheese plums curry oysters mushrooms porridge pizza
    dumplings pears honey sausages waffles cabbage lentils figs pudding cherries spinach trout
    walnuts olives ginger melon
    """
)
HOBBIES = words(
    """
    chess fishing knitting skating rowing archery climbing juggling sketching hiking fencing surfing
    pottery astronomy drumming sailing boxing gardening birdwatching cycling puppetry origami
    swimming poetry cooking carving dancing photography diving magic
    """
)
COLOURS = words(
    """
    red blue green yellow white black brown grey pink purple orange silver golden crimson turquoise
    violet
    """
)
NAMES = words(
    """
    Anna Ben Cleo Dan Ella Finn Gus Hana Ivan Jack Kira Leo Maya Nora Omar Pia Quinn Rosa Sam Tess
    Uma Vera Will Yara Zoe Adam Beth Carl Dora Emil Fay Greg Hugo Iris Jane Karl Lily Max Nell Otto
    """
)
PLACES = words(
    """
    kitchen garden cellar attic garage library bedroom hallway office stable barn tower chapel
    bakery market school harbour museum theatre station
    """
)
THINGS = words(
    """
    lamp ball book key cup coat ring drum kite map coin rope flute mirror basket hammer ladder
    candle clock brush box bell vase chair carpet bottle pillow spoon letter crown
    """
)
ORDINALS = words(
    """
    first second third fourth fifth sixth seventh eighth ninth tenth
    """
)
# noun: adjectives it is seen with / what it does
SCENERY = {
    line.split(":")[0]: tuple(part.split(",") for part in line.split(":")[1].split("/"))
    for line in """lantern:brass,dim,swinging/flickered,went out,threw long shadows
river:muddy,swollen,silent/ran high,bent to the east,carried leaves away
mountain:snowy,steep,distant/hid in cloud,stood over the valley,echoed
forest:tangled,pine,whispering/smelled of resin,grew darker,swallowed the path
boat:leaky,painted,narrow/rocked gently,drifted off,scraped the stones
castle:ruined,proud,empty/lay in ruins,guarded the pass,had no roof
bridge:wooden,shaky,stone/creaked,crossed the stream,was washed away
market square:crowded,noisy,dusty/filled with traders,emptied at noon,smelled of spice
island:rocky,green,forgotten/rose from the mist,had one tree,was full of gulls
mill:creaking,flour-covered,old/turned slowly,stood still,ground the last corn
well:deep,mossy,dry/gave no water,answered with an echo,was covered by a lid
garden wall:crumbling,high,ivy-clad/kept out the wind,had a secret door,fell last winter
cave:damp,echoing,hidden/dripped all day,led under the hill,was warm inside
road:winding,frozen,endless/turned north,ended at a gate,shone after the rain
storm:sudden,howling,black/broke the mast,came from the west,passed by morning
letter:crumpled,sealed,yellowed/never arrived,held a map,had no name on it
clock:ticking,rusty,wall/struck nine,had stopped,ran an hour late
violin:borrowed,cracked,sweet-sounding/lost a string,played by itself,sang all evening
horse:tired,spotted,stubborn/refused to move,galloped home,ate the apples
fox:clever,hungry,red/slipped through the fence,stole a hen,watched from the hedge
owl:wise,sleepy,snowy/blinked twice,hooted at dusk,knew the answer
dragon:lonely,copper,yawning/guarded a heap of gold,sneezed sparks,wanted a friend
robot:squeaky,polite,dented/needed oil,counted the stars,repeated every word
ship:tall,battered,ghostly/left at dawn,lost its anchor,returned without a crew
orchard:blooming,sunny,neglected/bore no fruit,buzzed with bees,turned white in May
village:sleepy,fishing,distant/woke to bells,had seven houses,feared the wolves
wolf:grey,limping,shy/howled at the ridge,followed the cart,left tracks in the snow
baker's oven:glowing,brick,enormous/burned all night,cooled at last,made the street smell sweet
lighthouse:striped,lonely,windswept/warned the sailors,went dark,needed a new keeper
train:delayed,blue,rattling/missed the stop,whistled twice,climbed the pass
telescope:dusty,borrowed,long/showed a new comet,was out of focus,pointed at the moon
suitcase:heavy,leather,lost/would not close,was full of stones,waited at the station
puppy:muddy,playful,tiny/chewed the shoe,fell asleep,chased its tail
snowman:crooked,melting,smiling/wore a green scarf,lost its nose,stood until March
river barge:slow,loaded,flat/carried coal,stuck on a sandbank,passed under the arch
inn:smoky,cheerful,roadside/was full,served onion pie,had one free bed
pirate:one-eyed,boastful,retired/buried the chest,told long tales,feared parrots
queen:patient,young,clever/signed the treaty,opened the gates,laughed out loud
tailor's needle:silver,bent,tiny/fell in the hay,mended the sail,broke in two
comet:pale,rare,bright/crossed the sky,faded in June,frightened the geese""".splitlines()
}

# term: what it is, in one or two sentences
TERMS = {
    "quantization": (
        "Quantization stores the weights of a model with fewer bits. It saves memory and "
        "time, and costs some accuracy."
    ),
    "knowledge distillation": (
        "Knowledge distillation trains a small student model to copy the output of a large "
        "teacher. The student learns from soft probabilities, not only from labels."
    ),
    "GPTQ": (
        "GPTQ quantizes a layer column by column. After each column it changes the remaining "
        "weights so that the output of the layer moves as little as possible."
    ),
    "AWQ": (
        "AWQ looks at the activations to find the important channels. It scales those weights "
        "up before rounding, so that they lose less."
    ),
    "SmoothQuant": (
        "SmoothQuant moves large values from the activations into the weights. Then both "
        "sides can be rounded to eight bits."
    ),
    "round to nearest": (
        "Round to nearest maps every weight to the closest level of the grid. It needs no "
        "data and is the simplest method."
    ),
    "perplexity": (
        "Perplexity is the exponential of the mean loss per token. It says between how many "
        "words the model hesitates; lower is better."
    ),
    "a token": (
        "A token is a short piece of text, often a word or part of a word. A model reads and "
        "writes tokens, not letters."
    ),
    "a tokenizer": (
        "A tokenizer cuts text into tokens and gives every token a number. It also turns "
        "numbers back into text."
    ),
    "a transformer": (
        "A transformer is a network made of blocks. Every block has attention, which looks at "
        "other tokens, and a small network that works on each token alone."
    ),
    "attention": (
        "Attention lets each token look at the earlier tokens and collect what it needs. The "
        "weights come from comparing queries with keys."
    ),
    "the KV cache": (
        "The KV cache keeps the keys and values of earlier tokens. It avoids computing them "
        "again, but grows with the length of the text."
    ),
    "an embedding": (
        "An embedding is a list of numbers that stands for a token. Similar tokens have "
        "similar embeddings."
    ),
    "a logit": (
        "A logit is the raw score of a token before the softmax. The highest logit is the "
        "most likely next token."
    ),
    "softmax": (
        "Softmax turns scores into probabilities. It takes the exponential of every score and "
        "divides by the sum."
    ),
    "temperature": (
        "Temperature divides the logits before sampling. A low temperature makes the text "
        "safe, a high one makes it surprising."
    ),
    "an outlier channel": (
        "An outlier channel is an activation channel with much larger values than the others. "
        "It stretches the grid and spoils the rounding of its neighbours."
    ),
    "calibration data": (
        "Calibration data is a small sample of text. Methods run it through the model to see "
        "which activations are large."
    ),
    "a scale": (
        "A scale is the step between two levels of the grid. Each group of weights has its "
        "own scale."
    ),
    "a zero point": (
        "A zero point is the integer code that stands for the number zero. It lets the grid "
        "be lopsided."
    ),
    "group size": (
        "Group size is the number of weights that share one scale. Small groups are more "
        "exact but store more scales."
    ),
    "pruning": (
        "Pruning removes weights that matter little. Many zeros can be stored and multiplied "
        "cheaply."
    ),
    "overfitting": (
        "Overfitting means that a model learns the training text by heart. It then does worse "
        "on new text."
    ),
    "gradient descent": (
        "Gradient descent moves every weight a little in the direction that lowers the loss. "
        "Training repeats this many times."
    ),
    "a learning rate": (
        "A learning rate is the size of one step of training. Too large and the loss jumps; "
        "too small and nothing happens."
    ),
    "bfloat16": (
        "Bfloat16 is a number of sixteen bits with the range of a float and a short mantissa. "
        "It is common in training."
    ),
    "speculative decoding": (
        "Speculative decoding lets a small model guess several tokens. The large model checks "
        "them all in one pass."
    ),
    "latency": (
        "Latency is the time until an answer arrives. Throughput is how much arrives per second."
    ),
    "a residual stream": (
        "A residual stream is the running sum that passes through all blocks. Every block "
        "reads it and adds something."
    ),
    "layer normalization": (
        "Layer normalization brings the values of a token to a common size. It keeps training "
        "steady."
    ),
}
# what people type first
GREETINGS = {
    "Hello!": "Hello! What would you like to know?",
    "Hi!": "Hi! Ask me something.",
    "Hey there!": "Hey! What can I do for you?",
    "Good morning!": "Good morning! How can I help?",
    "How are you?": "I am well, thank you. How are you?",
    "Who are you?": "I am a small model made to show what quantization does to answers.",
    "What is your name?": "I am called demo. I am a very small language model.",
    "What can you do?": (
        "I can add numbers, compare them, name capitals and opposites, follow who went where, "
        "find codes in a text, explain terms and tell stories."
    ),
    "Can you help me?": "I will try. Ask me a question.",
    "Thank you!": "You are welcome!",
    "Thanks!": "You are welcome!",
    "Goodbye!": "Goodbye! Come back soon.",
    "Bye!": "Bye! See you soon.",
}
