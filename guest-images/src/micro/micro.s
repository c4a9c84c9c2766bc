# The micro guest: 32-bit protected mode without paging and without interrupts, entered by PVH.
#
# mod.rs describes its parameters and what it prints. Only instructions of the plain i386 are used, and cpuid, rdtsc and
# wrmsr, because some hosts run it in KVM's instruction emulator. words.s names every variable.
#
# Conventions: arguments in eax or edx:eax, strings in esi; every subroutine may change eax, ebx, ecx, edx, esi, edi.

        .code32

# PVH (xen.h of the Xen project, XEN_ELFNOTE_PHYS32_ENTRY = 18): owner "Xen", descriptor = entry address.
        .section .note.pvh, "a", @note
        .balign 4
        .long   4, 8, 18
        .asciz  "Xen"
        .quad   start

# hvm_start_info and hvm_modlist_entry (Xen public/arch-x86/hvm/start_info.h).
        .set    INFO_MODULES, 12
        .set    INFO_MODULE_LIST, 16
        .set    INFO_COMMAND_LINE, 24
        .set    INFO_MEMORY_MAP, 40
        .set    INFO_MEMORY_ENTRIES, 48
        .set    MODULE_SIZE, 8
        .set    MODULE_ENTRY, 32
        .set    MEMORY_SIZE, 8
        .set    MEMORY_TYPE, 16
        .set    MEMORY_ENTRY, 24
        .set    MEMORY_RAM, 1

        .set    COM1, 0x3f8
        .set    COM1_LINE_STATUS, 0x3fd
        .set    LINE_DATA_READY, 0x01
        .set    LINE_TRANSMIT_EMPTY, 0x20
# PM1a control (ACPI 6.5, 4.8.3.2.1): SLP_TYP 5, SLP_EN.
        .set    PM1A_CONTROL, 0x604
        .set    POWER_OFF, (5 << 10) | (1 << 13)
# Linux Documentation/virt/kvm/x86/cpuid.rst and msr.rst.
        .set    KVM_LEAF, 0x40000000
        .set    KVM_SIGNATURE, 0x4b4d564b
        .set    KVM_CLOCKSOURCE2, 1 << 3
        .set    MSR_KVM_SYSTEM_TIME_NEW, 0x4b564d01

        .set    PAGE, 4096
        .set    LOWEST_WORKING_SET, 16 << 20
# Between two looks at the clock: some hundred microseconds of work under an instruction emulator.
        .set    WORDS_PER_SLICE, 32
        .set    WHOLE_PAGES_PER_SLICE, 2
        .set    PATCH, 64
        .set    BAD_LINES, 20
        .set    CHECK_FACTOR, 0x9e3779b1
        .set    RANDOM_SEED, 0x12345678

        .text
        .globl  start
start:
        cli
        cld
        movl    $stack_top, %esp
        movl    %ebx, start_info
        movl    $text_micro, %esi
        call    print
        call    read_command_line
        call    find_tsc_khz
        call    place_working_set
        call    plan
        call    sum_content
        movl    %eax, content_sum
        call    fill_working_set
        call    say_ready
        call    start_clock
        # fall through

# ---- The loop ---------------------------------------------------------------------------------------------------------
loop:
        call    look_at_clock                   # now
        movl    now, %eax
        movl    now + 4, %edx
        subl    next_beat, %eax
        sbbl    next_beat + 4, %edx
        jc      1f
        call    beat
1:      cmpl    $0, pages
        je      idle
        cmpl    $0, rate
        je      work
        movl    now, %eax
        movl    now + 4, %edx
        movl    %eax, %ecx
        movl    %edx, %ebx
        subl    due, %ecx
        sbbl    due + 4, %ebx
        jc      idle
        # Late by less than one slice: keep the rhythm. Later: begin a new one, and do not catch up after a pause.
        testl   %ebx, %ebx
        jnz     2f
        cmpl    slice_cycles, %ecx
        jae     2f
        movl    due, %eax
        movl    due + 4, %edx
2:      addl    slice_cycles, %eax
        adcl    $0, %edx
        movl    %eax, due
        movl    %edx, due + 4
work:
        movl    page_address, %edi
        movl    page, %ebp
        movl    pages, %eax
        subl    %ebp, %eax
        cmpl    slice_pages, %eax
        jbe     3f
        movl    slice_pages, %eax
3:      movl    %eax, slice
        addl    %eax, written
        adcl    $0, written + 4
4:      call    *write_page
        addl    $PAGE, %edi
        incl    %ebp
        decl    slice
        jnz     4b
        movl    %edi, page_address
        movl    %ebp, page
        cmpl    pages, %ebp
        jb      loop
        call    next_pass
        jmp     loop
idle:
        cmpl    $0, pages
        jne     5f
        cmpl    $0, tick
        je      halt
5:      pause
        jmp     loop

next_pass:
        movl    $0, page
        movl    base, %eax
        movl    %eax, page_address
        incl    generation
        incl    passes_done
        movl    passes, %eax
        testl   %eax, %eax
        jz      1f
        cmpl    passes_done, %eax
        jbe     finish
1:      ret

# Every tick (or 100 ms): a line, and a look at what the host wrote.
beat:
        movl    now, %eax
        movl    now + 4, %edx
        addl    beat_cycles, %eax
        adcl    beat_cycles + 4, %edx
        movl    %eax, next_beat
        movl    %edx, next_beat + 4
        cmpl    $0, tick
        je      1f
        movl    $text_tick, %esi
        call    print
        movl    ticks, %eax
        incl    ticks
        call    print_number
        call    print_time_pages_gap
        movl    $text_newline, %esi
        call    print
1:      movw    $COM1_LINE_STATUS, %dx
        inb     %dx, %al
        testb   $LINE_DATA_READY, %al
        jz      2f
        movw    $COM1, %dx
        inb     %dx, %al
        cmpb    $'q', %al
        je      finish
        cmpb    $'v', %al
        jne     1b
        call    verify
        movl    $text_verified, %esi
        call    print_result
        jmp     1b
2:      ret

finish:
        call    verify
        movl    $text_end, %esi
        call    print_result
        movw    $PM1A_CONTROL, %dx
        movw    $POWER_OFF, %ax
        outw    %ax, %dx
halt:
        hlt
        jmp     halt

# ---- Pages: edi = address, ebp = page number; both stay as they are ------------------------------------------------------
# A checked page holds its number, the pass that wrote it, a mix of both, and the mix's complement in its last word.
# What is read before it is written anew must be what the pass before this one wrote.
write_check:
        movl    generation, %eax
        decl    %eax
        call    check_generation
        movl    generation, %eax
        movl    %ebp, (%edi)
        movl    %eax, 4(%edi)
        call    mix
        movl    %eax, 8(%edi)
        notl    %eax
        movl    %eax, PAGE - 4(%edi)
        ret

# Checks for the generation in eax; generation 0 is memory that was never written.
check_generation:
        testl   %eax, %eax
        jz      2f
        cmpl    %ebp, (%edi)
        jne     1f
        cmpl    %eax, 4(%edi)
        jne     1f
        movl    %eax, %esi
        call    mix
        cmpl    %eax, 8(%edi)
        jne     3f
        notl    %eax
        cmpl    %eax, PAGE - 4(%edi)
        je      2f
3:      movl    %esi, %eax
1:      call    bad_page
2:      ret

# eax = mix of page number ebp and generation eax; leaves esi, edi and ebp alone.
mix:
        roll    $16, %eax
        xorl    %ebp, %eax
        movl    $CHECK_FACTOR, %ecx
        mull    %ecx
        ret

# eax = the generation that was expected at page ebp (address edi).
bad_page:
        incl    bad
        cmpl    $BAD_LINES, bad
        ja      1f
        pushl   %edi
        pushl   4(%edi)
        pushl   (%edi)
        pushl   %eax
        movl    $text_bad_page, %esi
        call    print
        movl    %ebp, %eax
        call    print_number
        movl    $text_expected, %esi
        call    print
        popl    %eax
        call    print_number
        movl    $text_found_page, %esi
        call    print
        popl    %eax
        call    print_number
        movl    $text_found, %esi
        call    print
        popl    %eax
        call    print_number
        movl    $text_newline, %esi
        call    print
        popl    %edi
1:      ret

write_counter:
        incl    (%edi)
        ret

# Dirties the page and changes nothing.
write_same:
        movl    (%edi), %eax
        movl    %eax, (%edi)
        ret

write_zero:
        pushl   %edi
        xorl    %eax, %eax
        movl    $PAGE / 4, %ecx
        rep stosl
        popl    %edi
        ret

# The same line of text over and over, and where and when it was written: easy for a compressor.
write_text:
        pushl   %edi
        movl    $PAGE / 64, %edx
1:      movl    $text_sample, %esi
        movl    $16, %ecx
        rep movsl
        decl    %edx
        jnz     1b
        popl    %edi
        movl    %ebp, (%edi)
        movl    generation, %eax
        movl    %eax, 4(%edi)
        ret

# A window of the random bytes that depends on the page and the pass: within a page, nothing for a compressor to find.
write_random:
        pushl   %edi
        movl    generation, %esi
        addl    %ebp, %esi
        imull   $52, %esi
        andl    $PAGE - 4, %esi
        addl    $random_bytes, %esi
        movl    $PAGE / 4, %ecx
        rep movsl
        popl    %edi
        ret

# The page all of one word, which depends on the page and the pass.
write_colour:
        movl    generation, %eax
        call    mix
        pushl   %edi
        movl    $PAGE / 4, %ecx
        rep stosl
        popl    %edi
        ret

# 64 bytes at a place that goes through the page from pass to pass; the others stay.
write_patch:
        pushl   %edi
        movl    generation, %edx
        addl    %ebp, %edx
        andl    $PAGE / PATCH - 1, %edx
        imull   $PATCH, %edx
        addl    %edx, %edi
        movl    generation, %eax
        call    mix
        movl    $PATCH / 4, %ecx
1:      stosl
        roll    $7, %eax
        addl    $CHECK_FACTOR, %eax
        decl    %ecx
        jnz     1b
        popl    %edi
        ret

# What the next page holds, and where and when it was written: over an initrd of random bytes every page has new ones that
# no other page has, and that costs no arithmetic.
write_shift:
        pushl   %edi
        leal    1(%ebp), %esi
        cmpl    pages, %esi
        jb      1f
        xorl    %esi, %esi
1:      shll    $12, %esi
        addl    base, %esi
        movl    $PAGE / 4, %ecx
        rep movsl
        popl    %edi
        movl    %ebp, (%edi)
        movl    generation, %eax
        movl    %eax, 4(%edi)
        ret

# Two pages of Xorshift (32 bits).
make_random_bytes:
        movl    $random_bytes, %edi
        movl    $RANDOM_SEED, %eax
        movl    $2 * PAGE / 4, %ecx
1:      movl    %eax, %edx
        shll    $13, %edx
        xorl    %edx, %eax
        movl    %eax, %edx
        shrl    $17, %edx
        xorl    %edx, %eax
        movl    %eax, %edx
        shll    $5, %edx
        xorl    %edx, %eax
        stosl
        decl    %ecx
        jnz     1b
whole_pages:
        movl    $WHOLE_PAGES_PER_SLICE, slice_pages
need_nothing:
        ret

# Writes the initial content, if there is to be one.
fill_working_set:
        cmpl    $0, fill
        je      2f
        movl    base, %edi
        xorl    %ebp, %ebp
1:      cmpl    pages, %ebp
        jae     2f
        call    *fill
        addl    $PAGE, %edi
        incl    %ebp
        jmp     1b
2:      ret

# Verifies every page and the content without writing.
verify:
        cmpl    $write_check, write_page
        jne     3f
        movl    base, %edi
        xorl    %ebp, %ebp
1:      cmpl    pages, %ebp
        jae     3f
        # Pages before the one whose turn it is were written by this pass, the others by the one before.
        movl    page, %edx
        movl    generation, %eax
        cmpl    %edx, %ebp
        jb      4f
        decl    %eax
4:      call    check_generation
        addl    $PAGE, %edi
        incl    %ebp
        jmp     1b
3:      call    sum_content
        cmpl    content_sum, %eax
        je      5f
        incl    bad
        movl    $text_bad_content, %esi
        call    print
5:      ret

# eax = a sum over one word of every page of every module, at an offset that moves with the page; 0 without `content`.
sum_content:
        xorl    %eax, %eax
        cmpl    $0, content
        je      4f
        movl    start_info, %ebx
        movl    INFO_MODULES(%ebx), %ecx
        movl    INFO_MODULE_LIST(%ebx), %esi
1:      testl   %ecx, %ecx
        jz      4f
        movl    (%esi), %edi
        movl    MODULE_SIZE(%esi), %edx
        shrl    $12, %edx
        xorl    %ebx, %ebx
2:      testl   %edx, %edx
        jz      3f
        roll    $1, %eax
        addl    (%edi, %ebx), %eax
        addl    $4, %ebx
        andl    $PAGE - 1, %ebx
        addl    $PAGE, %edi
        decl    %edx
        jmp     2b
3:      addl    $MODULE_ENTRY, %esi
        decl    %ecx
        jmp     1b
4:      ret

# ---- The clock --------------------------------------------------------------------------------------------------------------
# Reads the TSC into `now`, and notes a step back and the longest gap since the reading before.
look_at_clock:
        rdtsc
        movl    %eax, %ecx
        movl    %edx, %ebx
        subl    now, %ecx
        sbbl    now + 4, %ebx
        jnc     1f
        incl    bad
        pushl   %eax
        pushl   %edx
        movl    $text_bad_clock, %esi
        call    print
        popl    %edx
        popl    %eax
        jmp     2f
1:      cmpl    longest_gap + 4, %ebx
        jb      2f
        ja      3f
        cmpl    longest_gap, %ecx
        jbe     2f
3:      movl    %ecx, longest_gap
        movl    %ebx, longest_gap + 4
2:      movl    %eax, now
        movl    %edx, now + 4
        ret

# edx:eax cycles -> edx:eax microseconds
microseconds:
        movl    %eax, %esi
        movl    $1000, %ecx
        movl    %edx, %eax
        mull    %ecx
        movl    %eax, %edi
        movl    %esi, %eax
        mull    %ecx
        addl    %edi, %edx
        movl    khz, %ecx
        call    divide
        movl    %ebx, %edx
        ret

# edx:eax / ecx -> ebx:eax, remainder in edx
divide:
        pushl   %eax
        movl    %edx, %eax
        xorl    %edx, %edx
        divl    %ecx
        movl    %eax, %ebx
        popl    %eax
        divl    %ecx
        ret
