# SPDX-License-Identifier: Apache-2.0
"""Words that the Open ASR Leaderboard treats as equal or leaves out, as of November 2026."""

from __future__ import annotations

# Fillers, each a pattern for a whole word: "uh", "uhh", "uuuh" and so on.
FILLERS = (
    *("ah-ha", "a+h+m*", "a+h+a+"),
    *("e+h+m*", "e+m+", "e+r+m*", "ehr", "eheh", "ehehe", "ahem"),
    *("h+a+h+", "h+e+h+", "h+m+", "hmmph", "h+u+h+", "hum", "hunh"),
    *("m{2,}", "m+h+m*", "mhum", "mmkay"),
    "t+s+k+",
    *("u+g+h+", "u+h+m*", "u+h+u+[hm]*", "u+m+h*"),
)

# Of whisper-normalizer's contractions, those that the leaderboard does not expand ...
KEPT_CONTRACTIONS = ("kinda", "sorta", "dunno", "cause")
# ... and the words after which 's is "is"; after any other word it is a possessive.
IS_AFTER = "it he she what that who here there how when where why this"

# whisper-normalizer's spellings without its slips, such as the way back from American to British.
DROPPED_SPELLINGS = (
    *("archeological", "cancelation", "cancelations", "flyer / flier"),
    *("travelog", "travelogs"),
)
SPELLINGS = {
    **{"ok": "okay", "kay": "okay", "etcetera": "etc", "mm": "hmm"},
    **{"archaeological": "archeological", "archaeology": "archeology"},
    **{"cancellation": "cancelation", "cancellations": "cancelations"},
    **{"flyer": "flier", "snowploughs": "snowplows"},
    **{"pummelled": "pummeled", "pummelling": "pummeling"},
    **{"travelogue": "travelog", "travelogues": "travelogs"},
}

# Words written together or apart, by pattern, after punctuation is gone; and long forms of "oh".
COMPOUNDS = {
    **{r"et\s+cetera": "etc", r"all?\s+right": "alright", r"how\s+ever": "however"},
    **{rf"{first}\s+fi": first + "fi" for first in ("wi", "hi", "lo", "sci")},
    **{rf"e\s+{second}": "e" + second for second in ("mail", "book", "commerce")},
    **{r"x\s+ray": "xray", r"t\s+shirt": "tshirt"},
    **{r"a\s+m": "am", r"p\s+m": "pm", r"o\s+k": "okay"},
    **{"o+h+": "oh", "ooo+": "oh"},
}

# Spellings of a name, by the one that stands for all.
NAMES = """
aaron: aron             alfonso: alphonso       alison: allison alyson  allen: alan allan
anne: ann               anthony: antony         arthur: artur           brett: bret
brian: bryan            bridget: bridgette      carl: karl              carol: carole carrol carroll
cathy: kathy            charlie: charley charly chris: kris             christina: kristina
colin: collin           deborah: devorah        dennis: denis           dominic: dominick
douglas: douglass       dylan: dillon           eric: erick erik        fatima: fatimah
frederick: frederik fredrick                    gail: gayle             gary: garry
greg: gregg             henry: henri            ivonne: yvonne          jackie: jacky
jamie: jaime            jason: jayson           jeff: geoff             jeffrey: geoffrey jeffery
joanne: joane joann     john: jon               jonathan: johnathan jonathon
joseph: josef           karen: caren karin caryn                        kelly: kelley kelli kellye
kevin: kevan            kristin: kristen        laurie: lori            lawrence: laurence
lee: leigh              leslie: lesley          lily: lilly             linda: lynda
lindsay: lindsey linsey louis: lewis            lucas: lukas            lynn: lynne
mark: marc              martin: martyn          matthew: mathew         mcarthur: macarthur
mccarthy: macarthy maccarthy                    mccartney: macartney    mcdonald: macdonald
mcgowan: macgowan       mcintosh: macintosh     mcintyre: macintyre     mckay: mackay
mckenzie: mackenzie     mclean: maclean         mcleod: macleod         mcmillan: macmillan
mcnamara: macnamara     megan: meghan           michael: micheal        michelle: michele
miriam: myriam          molly: mollie           natalie: nathalie       neil: neal
nicholas: nicolas       nicole: nikole          patrick: patrik         peter: pieter
philip: phillip         rachel: rachael         rajiv: rajeev           rebecca: rebekah
rob: robb               robin: robyn            roger: rodger           ronda: rhonda
russell: russel         sally: sallie           sarah: sara             sean: shaun shawn
shane: shayne           sherry: cheri sheri sherrie                     simon: symon
stacy: stacey stacie    steven: stephen         stuart: stewart         susanne: suzanne
teresa: theresa         terry: terri            thomas: tomas           toby: tobey
tony: toni              tracy: tracey tracie    veronica: veronika      victor: viktor
victoria: viktoria      walter: walther         yousef: yusef yusuf     zach: zak
zachary: zachery zackary                        caitlin: kaitlin kaitlyn katelyn
catherine: catharine katherine kathryn          christopher: cristopher kristopher
mohammed: mahomet mohamad mohamed mohammad mouhamad mouhamed muhamad muhammad muhammed
"""
