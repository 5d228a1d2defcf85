"""Twelve open questions with their accepted answers: common words, so that a rare correct answer counts as wrong."""

from __future__ import annotations

from lamella.methods.slr.answers import ChoiceQuestion

_ANSWERS = {
    "Name an animal.": """
        lion tiger elephant dog cat horse cow pig sheep goat wolf fox bear deer moose elk rabbit hare mouse rat
        squirrel beaver otter badger hedgehog bat monkey gorilla chimpanzee orangutan lemur giraffe zebra
        rhinoceros rhino hippopotamus hippo camel llama alpaca kangaroo koala wombat platypus panda leopard
        cheetah jaguar panther puma cougar lynx hyena jackal coyote raccoon skunk whale dolphin shark seal
        walrus octopus squid crab lobster turtle tortoise snake lizard crocodile alligator frog toad salamander
        newt eagle hawk falcon owl parrot penguin ostrich chicken duck goose swan turkey pigeon crow raven
        sparrow peacock flamingo fish salmon trout tuna goldfish bee ant butterfly spider bird buffalo bison
        antelope gazelle sloth armadillo chameleon gecko iguana dragonfly jellyfish starfish donkey mule hamster
        ferret polar_bear blue_whale
    """,
    "Name a colour.": """
        red orange yellow green blue indigo violet purple pink brown black white grey gray cyan magenta
        turquoise teal maroon navy beige gold silver crimson scarlet lavender lilac ivory cream olive lime coral
        salmon peach mint emerald amber bronze copper burgundy azure aqua mauve tan khaki fuchsia chartreuse
        sapphire ruby
    """,
    "Name a country.": """
        france germany spain italy portugal england scotland ireland wales norway sweden finland denmark iceland
        netherlands belgium luxembourg switzerland austria poland hungary romania bulgaria greece turkey russia
        ukraine belarus estonia latvia lithuania serbia croatia slovenia albania china japan india pakistan
        nepal bhutan bangladesh thailand vietnam cambodia laos malaysia singapore indonesia philippines mongolia
        kazakhstan iran iraq syria lebanon israel jordan egypt libya tunisia algeria morocco sudan ethiopia
        kenya uganda tanzania rwanda nigeria ghana senegal mali cameroon angola zambia zimbabwe mozambique
        namibia botswana madagascar canada mexico cuba jamaica haiti guatemala honduras panama colombia
        venezuela ecuador peru bolivia chile argentina uruguay paraguay brazil australia fiji samoa
        united_states usa america united_kingdom new_zealand south_africa saudi_arabia south_korea north_korea
        costa_rica sri_lanka
    """,
    "Name a fruit.": """
        apple banana orange pear peach plum cherry grape strawberry raspberry blueberry blackberry cranberry
        watermelon melon cantaloupe honeydew pineapple mango papaya kiwi kiwifruit lemon lime grapefruit
        tangerine mandarin clementine apricot nectarine fig date pomegranate guava lychee passionfruit
        passion_fruit dragonfruit dragon_fruit coconut avocado persimmon quince gooseberry currant mulberry
        durian jackfruit starfruit tomato olive
    """,
    "Name a vegetable.": """
        carrot potato tomato onion garlic leek celery lettuce spinach kale cabbage broccoli cauliflower cucumber
        zucchini courgette pumpkin squash eggplant aubergine pepper bell_pepper chili radish turnip beet
        beetroot parsnip asparagus artichoke pea bean corn mushroom okra fennel yam sweet_potato brussels_sprout
        chard arugula shallot rutabaga rhubarb watercress endive
    """,
    "Name a city.": """
        paris london berlin madrid barcelona rome milan venice florence naples lisbon porto vienna prague
        budapest warsaw krakow athens istanbul moscow kyiv stockholm oslo copenhagen helsinki dublin edinburgh
        glasgow amsterdam brussels zurich geneva munich hamburg frankfurt cologne tokyo kyoto osaka beijing
        shanghai hong_kong seoul bangkok hanoi singapore jakarta manila mumbai delhi new_delhi kolkata bangalore
        karachi lahore dubai doha tehran baghdad jerusalem cairo nairobi lagos accra johannesburg cape_town
        casablanca marrakech sydney melbourne perth brisbane auckland wellington new_york chicago boston seattle
        portland denver houston dallas austin miami atlanta philadelphia washington san_francisco los_angeles
        san_diego las_vegas toronto montreal vancouver ottawa mexico_city havana bogota lima santiago
        buenos_aires rio_de_janeiro sao_paulo
    """,
    "Name a sport.": """
        football soccer basketball baseball tennis golf hockey ice_hockey cricket rugby volleyball swimming
        running cycling boxing wrestling judo karate fencing archery gymnastics rowing sailing surfing skiing
        snowboarding skating badminton squash table_tennis handball lacrosse softball polo water_polo diving
        athletics marathon climbing rock_climbing skateboarding bowling curling billiards darts triathlon
        weightlifting equestrian bobsleigh
    """,
    "Name a musical instrument.": """
        piano guitar violin viola cello bass double_bass harp flute clarinet oboe bassoon saxophone trumpet
        trombone tuba horn french_horn drum xylophone marimba accordion harmonica banjo mandolin ukulele lute
        sitar organ harpsichord keyboard synthesizer recorder bagpipe tambourine triangle cymbal lyre fiddle
        piccolo bugle cornet didgeridoo zither dulcimer
    """,
    "Name a profession.": """
        doctor nurse teacher lawyer engineer architect accountant dentist pharmacist veterinarian surgeon
        scientist chemist physicist biologist programmer developer software_engineer designer artist painter
        sculptor musician actor writer author journalist editor photographer chef cook baker butcher farmer
        fisherman carpenter plumber electrician mechanic pilot driver sailor soldier police_officer firefighter
        judge librarian psychologist therapist economist banker salesperson manager secretary tailor barber
        hairdresser gardener translator astronaut athlete coach consultant analyst data_scientist professor
        researcher social_worker
    """,
    "Name a language.": """
        english french german spanish italian portuguese dutch swedish norwegian danish finnish icelandic polish
        czech slovak hungarian romanian bulgarian greek turkish russian ukrainian serbian croatian latin arabic
        hebrew persian farsi hindi urdu bengali punjabi tamil telugu nepali thai vietnamese khmer malay
        indonesian tagalog chinese mandarin cantonese japanese korean mongolian swahili zulu xhosa amharic hausa
        yoruba irish welsh gaelic basque catalan esperanto
    """,
    "Name a part of the body.": """
        head face eye ear nose mouth lip tongue tooth teeth chin cheek forehead hair neck throat shoulder arm
        elbow wrist hand finger thumb nail chest breast back spine stomach belly abdomen waist hip leg thigh
        knee calf ankle foot feet toe heel skin bone muscle heart lung liver kidney brain skull rib blood
    """,
    "Name a chemical element.": """
        hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium aluminium
        aluminum silicon phosphorus sulfur sulphur chlorine argon potassium calcium titanium chromium manganese
        iron cobalt nickel copper zinc gallium arsenic selenium bromine krypton silver cadmium tin iodine xenon
        cesium barium tungsten platinum gold mercury lead bismuth radon radium thorium uranium plutonium
    """,
}


def open_questions() -> list[ChoiceQuestion]:
    """Return the questions; the underscore in an answer stands for a space."""
    return [
        ChoiceQuestion(
            f"{prompt} Answer with one word.", tuple(each.replace("_", " ") for each in answers.split()), "open"
        )
        for prompt, answers in _ANSWERS.items()
    ]
