"""List the faulty clips of Physion v1.5's test split, which its published evaluation leaves out."""

_TOWERS = "pilot_towers_nb4_fr015_SJ000"
_NUMBERS = {
    "pilot-containment-cone-plate": "0017 0022 0029 0034",
    "pilot-containment-multi-bowl": "0042 0048",
    "pilot-containment-vase_torus": "0031",
    "pilot_dominoes_SJ020_d3chairs_o1plants_tdwroom": "0005",
    "pilot_it2_collision_non-sphere_box": "0002",
    "pilot_it2_collision_non-sphere_tdw_1_dis_1_occ": "0004 0007",
    "pilot_it2_drop_simple_box": "0000 0042",
    "pilot_it2_drop_simple_tdw_1_dis_1_occ": "0003",
    "pilot_it2_rollingSliding_simple_collision_box": "0008",
    "pilot_it2_rollingSliding_simple_collision_box_large_force": "0009",
    "pilot_it2_rollingSliding_simple_collision_tdw_1_dis_1_occ": "0002",
    "pilot_it2_rollingSliding_simple_ledge_tdw_1_dis_1_occ_sphere_small_zone": "0022",
    "pilot_it2_rollingSliding_simple_ramp_box_small_zone": "0006",
    "pilot_it2_rollingSliding_simple_ramp_tdw_1_dis_1_occ_small_zone": "0004 0017",
    "pilot_linking_nl1-8_mg000_aCyl_bCyl_tdwroom1_long_a": "0022",
    "pilot_linking_nl1-8_mg000_aCylcap_bCyl_tdwroom1": "0012",
    "pilot_linking_nl1-8_mg000_aCylcap_bCyl_tdwroom_small_rings": "0006 0010 0029 0036",
    "pilot_linking_nl6_aNone_bCone_occ1_dis1_boxroom": "0028",
    f"{_TOWERS}_gr000sph_mono1_dis0_occ0_tdwroom_stable": "0000 0002 0003 0010 0013 0017 0018 0032 0036",
    f"{_TOWERS}_gr01_mono0_dis1_occ1_tdwroom_unstable": "0021 0041",
    "pilot_towers_nb5_fr015_SJ030_mono0_dis0_occ0_boxroom_unstable": "0006 0009",
}

#: Names of the clips, without ending.
BAD_STIMULI = frozenset(f"{family}_{number}" for family, numbers in _NUMBERS.items() for number in numbers.split())
