# The micro guest's words, numbers and variables. Assembled behind start.s.

        .text
say_ready:
        movl    $text_ready, %esi
        call    print
        movl    khz, %eax
        call    print_number
        movl    $text_base, %esi
        call    print
        movl    base, %eax
        call    print_number
        movl    $text_pages, %esi
        call    print
        movl    pages, %eax
        call    print_number
        movl    $text_newline, %esi
        jmp     print

# esi = the word that begins the line
print_result:
        call    print
        movl    bad, %eax
        call    print_number
        movl    $text_passes, %esi
        call    print
        movl    passes_done, %eax
        call    print_number
        call    print_time_pages_gap
        movl    $text_newline, %esi
        jmp     print

print_time_pages_gap:
        movl    $text_microseconds, %esi
        call    print
        movl    now, %eax
        movl    now + 4, %edx
        subl    started, %eax
        sbbl    started + 4, %edx
        call    microseconds
        call    print_long
        movl    $text_pages, %esi
        call    print
        movl    written, %eax
        movl    written + 4, %edx
        call    print_long
        movl    $text_gap, %esi
        call    print
        movl    longest_gap, %eax
        movl    longest_gap + 4, %edx
        call    microseconds
        jmp     print_long

# Prints eax in decimal.
print_number:
        xorl    %edx, %edx
# Prints edx:eax in decimal.
print_long:
        movl    $digits_end, %esi
1:      movl    $10, %ecx
        call    divide
        addb    $'0', %dl
        decl    %esi
        movb    %dl, (%esi)
        movl    %ebx, %edx
        movl    %eax, %ecx
        orl     %ebx, %ecx
        jnz     1b
# Prints the string at esi.
print:
        lodsb
        testb   %al, %al
        jz      3f
        movb    %al, %ah
        movw    $COM1_LINE_STATUS, %dx
2:      inb     %dx, %al
        testb   $LINE_TRANSMIT_EMPTY, %al
        jz      2b
        movb    %ah, %al
        movw    $COM1, %dx
        outb    %al, %dx
        jmp     print
3:      ret

        .data
text_micro:     .asciz  "micro\n"
text_newline:   .asciz  "\n"
text_ready:     .asciz  "ready khz="
text_base:      .asciz  " base="
text_pages:     .asciz  " pages="
text_tick:      .asciz  "tick "
text_microseconds: .asciz " us="
text_gap:       .asciz  " gap_us="
text_passes:    .asciz  " passes="
text_end:       .asciz  "end bad="
text_verified:  .asciz  "verified bad="
text_bad_page:  .asciz  "BAD page="
text_expected:  .asciz  " generation="
text_found_page: .asciz " found_page="
text_found:     .asciz  " found_generation="
text_bad_clock: .asciz  "BAD clock stepped back\n"
text_bad_content: .asciz "BAD content\n"
text_no_room:   .asciz  "refused: the working set does not fit into the memory from 16 MiB on\n"
text_no_module: .asciz  "refused: over needs an initrd that is as large as the working set\n"
text_content_would_change: .asciz "refused: over changes what content is to keep\n"
text_unknown_pattern: .asciz "refused: unknown pattern or fill\n"
                .balign 4
text_sample:    .ascii  "GET /flyway/limosa?day=12 HTTP/1.1 200 km=11690 from=AK to=TAS\n "

name_ws:        .asciz  "ws="
name_rate:      .asciz  "rate="
name_tick:      .asciz  "tick="
name_passes:    .asciz  "passes="
name_khz:       .asciz  "khz="
name_pattern:   .asciz  "pattern="
name_fill:      .asciz  "fill="
name_content:   .asciz  "content"
name_over:      .asciz  "over"
name_check:     .asciz  "check"
name_counter:   .asciz  "counter"
name_same:      .asciz  "same"
name_zero:      .asciz  "zero"
name_text:      .asciz  "text"
name_random:    .asciz  "random"
name_colour:    .asciz  "colour"
name_patch:     .asciz  "patch"
name_shift:     .asciz  "shift"

        .balign 4
# name, reader, variable
parameters:
        .long   name_ws, read_number, ws
        .long   name_rate, read_number, rate
        .long   name_tick, read_number, tick
        .long   name_passes, read_number, passes
        .long   name_khz, read_number, khz
        .long   name_pattern, read_pattern, 0
        .long   name_fill, read_fill, 0
        .long   name_content, read_flag, content
        .long   name_over, read_flag, over
        .long   0
# name, writer, what it needs once
patterns:
        .long   name_check, write_check, need_nothing
        .long   name_counter, write_counter, need_nothing
        .long   name_same, write_same, need_nothing
        .long   name_zero, write_zero, whole_pages
        .long   name_text, write_text, whole_pages
        .long   name_random, write_random, make_random_bytes
        .long   name_colour, write_colour, whole_pages
        .long   name_patch, write_patch, need_nothing
        .long   name_shift, write_shift, whole_pages
        .long   0

# Parameters and their defaults.
ws:             .long   16 << 20
rate:           .long   0
tick:           .long   100
passes:         .long   0
khz:            .long   0
content:        .long   0
over:           .long   0
write_page:     .long   write_check
fill:           .long   0

# The state.
generation:     .long   1
slice_pages:    .long   WORDS_PER_SLICE

        .bss
        .balign 8
kvm_clock:      .skip   32
start_info:     .skip   4
content_sum:    .skip   4
base:           .skip   4
pages:          .skip   4
page:           .skip   4
page_address:   .skip   4
slice:          .skip   4
slice_cycles:   .skip   4
passes_done:    .skip   4
ticks:          .skip   4
bad:            .skip   4
written:        .skip   8
beat_cycles:    .skip   8
started:        .skip   8
now:            .skip   8
next_beat:      .skip   8
due:            .skip   8
longest_gap:    .skip   8
random_bytes:   .skip   2 * PAGE
digits:         .skip   20
digits_end:     .skip   4
stack:          .skip   1024
stack_top:
