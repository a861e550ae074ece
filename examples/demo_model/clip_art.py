"""List the public-domain clip art that shows each object (Debian's openclipart-svg)."""

CLIP_ART_FILES: dict[str, str] = {
    "dog": """
        animals/mammals/dog_01_drawn_with_strai_01.svg
        animals/mammals/dog_01_drawn_with_strai_02.svg
        animals/mammals/dog_01_drawn_with_strai_03.svg
        animals/mammals/dog_02_drawn_with_strai_01.svg
        animals/mammals/dog_03_drawn_with_strai_01.svg
        animals/mammals/dog_03_drawn_with_strai_02.svg
        animals/mammals/dog_04_drawn_with_strai_01.svg
        animals/mammals/dog_04_drawn_with_strai_02.svg
        animals/mammals/dog_05_drawn_with_strai_01.svg
        animals/mammals/dog_05_drawn_with_strai_02.svg
        animals/mammals/dog_06_drawn_with_strai_01.svg
        animals/mammals/dog_06_drawn_with_strai_02.svg
        animals/mammals/dog_on_leash_gerald_g._01.svg
        animals/mammals/dog_on_leash_gerald_g._02.svg
        animals/mammals/dogs/bored_dog_01.svg
        animals/mammals/dogs/bulldog_puppy_ganson.svg
        animals/mammals/dogs/dog_head_nicu_buculei_01.svg
        animals/mammals/dogs/dog_head_nicu_buculei_02.svg
    """,
    "cat": """
        animals/mammals/cartoon_cat_gerald_g._01.svg
        animals/mammals/cartoon_cat_gerald_g._02.svg
        animals/mammals/housecats/gattina_cat_architetto_f_01.svg
        animals/mammals/housecats/gatto_cat_architetto_fra_01.svg
        animals/mammals/housecats/gatto_cat_architetto_fra_02.svg
        animals/mammals/housecats/gatto_cat_architetto_fra_03.svg
        animals/mammals/housecats/gatto_cat_architetto_fra_04.svg
        animals/mammals/housecats/kitten_gerald_g._01.svg
        animals/mammals/housecats/sleeping_cat_rgolan_sup_r.svg
        animals/mammals/housecats/sleeping_cat_ron_golan_01.svg
    """,
    "pig": """
        animals/mammals/a_simple_pig_01.svg
        animals/mammals/pig_marcelo_caiafa1.svg
    """,
    "frog": """
        animals/red-eye_frog_mirko_maisc_01.svg
    """,
    "owl": """
        animals/birds/owl_on_branch_ganson.svg
    """,
    "fish": """
        animals/fish/brown_fish_01.svg
    """,
    "bee": """
        animals/bugs/bee.svg
        animals/bugs/bee1_mimooh_01.svg
        animals/bugs/bee2_mimooh_01.svg
        animals/bugs/bee3_mimooh_01.svg
    """,
    "turtle": """
        animals/turtle_jurgen_gaeremyn_01.svg
    """,
    "apple": """
        food/apple_bitten_dan_gerhard_01.svg
        food/fruit/an_apple_01.svg
        food/fruit/another_apple_01.svg
        food/fruit/apple.svg
        food/fruit/apple_bw.svg
        food/fruit/apple_martin_schmidt-li_01r.svg
        food/fruit/apple_mateya_01.svg
        food/fruit/cartoon_apple_k_yager_01.svg
    """,
    "pear": """
        food/fruit/green_pear_01.svg
        food/fruit/pear.svg
        food/fruit/pear_01.svg
        food/fruit/pear_02.svg
        food/fruit/pear_jean-victor_balin_01r.svg
        food/fruit/pear_simple.svg
        food/fruit/pear_simple_bw.svg
    """,
    "banana": """
        food/fruit/banana.svg
        food/fruit/banana_mateya_01.svg
    """,
    "lemon": """
        food/fruit/lemon.svg
        food/fruit/lemon1.svg
        food/fruit/lemon_simple.svg
        food/fruit/lemon_simple_bw.svg
        food/fruit/lemon_whole_ganson.svg
    """,
    "pineapple": """
        food/fruit/pineapple.svg
    """,
    "strawberry": """
        food/fruit/strawberry.svg
        food/fruit/strawberry_01.svg
        food/fruit/strawberry_jonathan_diet_01.svg
        food/fruit/strawberry_simple.svg
        food/fruit/strawberry_simple_bw.svg
    """,
    "pizza": """
        food/pizza_4_stagioni_archite_01.svg
        food/pizza_cheese.svg
        food/pizza_cheese_bw.svg
        food/pizza_pepperoni.svg
        food/pizza_pepperoni_bw.svg
        food/pizza_rectangular__geral_01.svg
        food/pizza_slice_01.svg
        food/pizza_slice_fco._andrade_01.svg
    """,
    "burger": """
        food/meats_and_eggs/burger_http_www.treebui_r.svg
        food/meats_and_eggs/burger_http_www.treebuil_.svg
        food/meats_and_eggs/burger_linda_kim_01.svg
        food/meats_and_eggs/chicken_burger.svg
        food/meats_and_eggs/chicken_burger_bw.svg
        food/meats_and_eggs/hamburger_bw.svg
        food/meats_and_eggs/hamburger_ganson.svg
    """,
    "cake": """
        food/cake_and_candle_anton_fr_01.svg
        food/desserts/birthday_cake.svg
        food/desserts/cake1_jarno_vasamaa_01.svg
        food/desserts/cake_jarno_vasamaa_r.svg
        food/desserts/cake_mateya_01.svg
        food/desserts/flat_cake_bw_jean-victor_01.svg
        food/desserts/flat_cake_jean-victor_ba_01.svg
        food/desserts/pink_cake_gabrielle_now_r.svg
    """,
    "car": """
        transportation/car_jamin_ellis_.svg
        transportation/formula_one_car_gerald_g_01.svg
        transportation/formula_one_car_gerald_g_02.svg
        transportation/old_car_lumen_design_st_r.svg
        transportation/skoda_car_alejandro_teja_.svg
        transportation/vehicles/car.svg
        transportation/vehicles/shelby_cobra_car_bluepr_.svg
    """,
    "bus": """
        transportation/aiga-symbols/aiga_bus1.svg
        transportation/aiga-symbols/aiga_bus_.svg
        transportation/bus1_bw_jarno_vasamaa_01.svg
        transportation/bus1_jarno_vasamaa_01.svg
        transportation/bus2_bw_jarno_vasamaa_01.svg
        transportation/bus2_jarno_vasamaa_01.svg
        transportation/bus_01.svg
        transportation/roadsigns/bus_symbol_black_01.svg
    """,
    "bike": """
        transportation/bicycle_philippe_colin_01.svg
        transportation/bike_tobias_jakobs_.svg
        transportation/vehicles/bicycle_01.svg
    """,
    "plane": """
        shapes/airplane_nicu_buculei_01.svg
        signs_and_symbols/airplane.svg
        transportation/plane_in_the_sky_mo_01.svg
        transportation/vehicles/departing_plane_01.svg
        transportation/vehicles/military_airplane_mo_01.svg
        transportation/vehicles/plane_silhouet_mo_01.svg
    """,
    "rocket": """
        transportation/vehicles/rocket.svg
    """,
    "boat": """
        transportation/boating/boat_jarno_vasamaa1.svg
        transportation/boating/boat_jarno_vasamaa_.svg
        transportation/boating/sailboat_illustration.svg
    """,
    "train": """
        recreation/toys/kiddy_train_orlando_kara_.svg
        transportation/roadsigns/train.svg
    """,
    "tree": """
        food/fruit/tree_whit_fruits_01.svg
        plants/fall_coloured_tree_geral_01.svg
        plants/flowers/cartoon_tree_01.svg
        plants/trees/christmas_tree_mo_01.svg
        plants/trees/evergreen/christmas_tree_01.svg
        plants/trees/evergreen/christmas_tree_02.svg
        plants/trees/evergreen/plain_tree_01.svg
        plants/trees/evergreen/tree.svg
        plants/trees/evergreen/tree_02.svg
        plants/trees/tree_01.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_01.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_02.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_03.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_04.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_05.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_06.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_07.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_08.svg
        signs_and_symbols/map_symbols/tree_-_rpg_map_elements_09.svg
    """,
    "cactus": """
        plants/cactus_linda_kim_01.svg
    """,
    "rose": """
        plants/flowers/pink-rose_tess_brady_01.svg
        unsorted/rose.svg
    """,
    "key": """
        computer/icons/key_juliane_krug_01.svg
        tools/key_jordan_wiens_01.svg
    """,
    "book": """
        education/books/book_01.svg
        education/books/book_02.svg
        education/books/closed_book_01.svg
        education/books/old_book_lumen_design_st_01.svg
        education/books/open_book_nae_02.svg
        education/books/paperback_book_black_gal_.svg
        education/books/stara_ksiega_-_old_book_01.svg
    """,
    "umbrella": """
        tools/umbrella.svg
    """,
    "guitar": """
        recreation/music/bass_guitar_a.j._ashton_.svg
        recreation/music/electric_guitar_andrea__01r.svg
        recreation/music/guitar_ganson.svg
        recreation/music/guitar_jarno_vasamaa1.svg
        recreation/music/guitar_jarno_vasamaa2.svg
        recreation/music/guitar_profile_philippe__01.svg
    """,
    "clock": """
        computer/icons/flat-theme/applications/clock.svg
        signs_and_symbols/clocks/alarm_clock_gerald_g._01.svg
        signs_and_symbols/clocks/alarm_clock_gerald_g._02.svg
        signs_and_symbols/clocks/alarm_clock_mike_powers_.svg
        signs_and_symbols/clocks/analog_clock_jonathan_di_01.svg
        signs_and_symbols/clocks/analogue_clock_01.svg
        signs_and_symbols/clocks/clock01.svg
        signs_and_symbols/clocks/clock02.svg
        signs_and_symbols/clocks/clock03.svg
        signs_and_symbols/clocks/clock04.svg
        signs_and_symbols/clocks/clock05.svg
        signs_and_symbols/clocks/clock06.svg
        signs_and_symbols/clocks/clock07.svg
        signs_and_symbols/clocks/clock08.svg
        signs_and_symbols/clocks/clock09.svg
        signs_and_symbols/clocks/clock10.svg
        signs_and_symbols/clocks/clock11.svg
        signs_and_symbols/clocks/clock12.svg
        signs_and_symbols/clocks/clock_michael_breuer_01.svg
        signs_and_symbols/clocks/clock_michael_breuer_02.svg
        signs_and_symbols/clocks/clock_michael_breuer_03.svg
        signs_and_symbols/clocks/clock_michael_breuer_04.svg
        signs_and_symbols/clocks/modern_clock_chris_kemps_01.svg
    """,
    "bell": """
        computer/icons/flat-theme/action/bell.svg
    """,
    "hat": """
        people/clothing/adventurer_hat_nicu_bucu_01.svg
        people/clothing/hats/aussie_hat_01.svg
        people/clothing/hats/hat_-_clothing_nicu_bucu_01.svg
        people/clothing/hats/hat_-_clothing_nicu_bucu_02.svg
        people/clothing/hats/hat_-_clothing_nicu_bucu_03.svg
        people/clothing/hats/hat_-_clothing_nicu_bucu_04.svg
        people/clothing/hats/hat_-_clothing_nicu_bucu_05.svg
        people/clothing/hats/hat_01.svg
        people/clothing/hats/hat_02.svg
        people/clothing/hats/pimp_hat_james_birkett_01.svg
        people/clothing/hats/purple_hat_nicu_buculei_01.svg
        people/clothing/hats/slouch_hat_01.svg
        people/clothing/winter_hat_nathan_eady_01.svg
    """,
    "crown": """
        people/clothing/hats/bejewelled_crown_with_t_01.svg
        people/clothing/hats/simple_crown_with_one_r_01.svg
        people/clothing/hats/simple_crown_with_three_01.svg
    """,
    "hammer": """
        tools/blacksmith_hammer_ganson.svg
        tools/construction_hammer_jon__01.svg
        tools/hammer_nicu_buculei_01.svg
        tools/hammer_peterm1.svg
    """,
}
